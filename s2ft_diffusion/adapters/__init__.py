"""An adapter as a file: its format, reading and writing."""
