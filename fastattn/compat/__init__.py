"""Other libraries' names for what is here, so that an import is all that a user changes."""
