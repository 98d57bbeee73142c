"""What slim can compare: the table of methods, where each starts, how it cuts, and one network slimmed by one of them."""
