"""Training objectives: pure functions of teacher and student, one idea a file."""
