"""Studies in which people judge videos: the questions, a page that asks them, and the paper's tables 3 and 4."""
