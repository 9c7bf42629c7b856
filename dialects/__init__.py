"""What clients say and are told, as pure translation: JSON to what is asked for, and what came of it to JSON."""
