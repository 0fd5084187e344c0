"""The programs. Each stage reads its inputs from disk, writes its outputs there, and knows no other stage."""
