"""What every command shows people in the same way: tables, progress bars, HTML pages."""
