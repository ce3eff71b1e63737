"""`make bench`: releases under load and throughput, side by side with a peer, as ratios of one run."""
