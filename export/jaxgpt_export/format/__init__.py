"""The artifact folder: what lies in it, what it says, and whether it is whole."""
