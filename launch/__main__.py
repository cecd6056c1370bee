"""`python -m launch` is the command `safepatch`."""

from launch import command

command.main()
