"""What the logs of this host say: Nginx's of each app with its rotated files, and the journal with all others."""
