"""A network read once, with what is true of it. Nothing here removes, prunes, trains or measures."""
