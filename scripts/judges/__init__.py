"""The table of what independent judges say of a host."""
