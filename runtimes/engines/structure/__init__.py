"""Checks of a program's bytes before an engine reads them: a damaged one could end the process."""
