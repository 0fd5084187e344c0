"""From the user's files to token ids: sources are read, formats recognised, templates applied, lengths fitted."""
