"""What users look at: tables in the terminal."""
