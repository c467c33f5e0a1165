"""Files written whole, and checkpoints that are trusted in nothing."""
