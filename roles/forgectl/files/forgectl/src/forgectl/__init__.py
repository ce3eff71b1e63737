"""forgectl: releases, secrets and state of the apps on one host."""
