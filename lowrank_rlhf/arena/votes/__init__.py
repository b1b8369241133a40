"""What people said of answers: the records, the one SQLite file, and the data sets made of it."""
