"""The commands of the command line, by what they do; `pliant.cli` puts them together."""
