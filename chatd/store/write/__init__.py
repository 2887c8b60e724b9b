"""The one writer: commands come in, each group is one transaction."""
