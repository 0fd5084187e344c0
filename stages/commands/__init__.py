"""The programs behind the commands. Each reads its inputs from disk, writes its outputs there, and knows no other one."""
