"""The margin map of a model, beside another one."""
