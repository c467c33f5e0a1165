"""What a course needs: hand in, check, report, the student edition and its self-checks."""
