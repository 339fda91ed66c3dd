"""Files of structures into records, records into batches, and generators that make more."""
