"""forgectl doctor: what is wrong with this host and its apps, from many small looks side by side, in seconds."""
