"""What commands print: tables on stdout, progress on stderr where that is a terminal."""
