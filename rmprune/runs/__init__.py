"""What a run keeps on disk: its directory, notes, records, and the cells of a comparison."""
