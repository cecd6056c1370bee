PROGRAMS = ("train", "score", "patch", "decode")  # the kinds that a plan knows
