"""What the control side works out before a host is touched: checks of the inventory, sizes, budgets, sources."""
