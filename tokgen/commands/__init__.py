"""What `tokgen COMMAND` does: functions whose signature and docstring are the command line. See `tokgen.cli`."""
