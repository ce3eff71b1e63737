"""Will an app run on the platform? Judged by parsing its source, never by running any of it.

Needs nothing but the standard library and `packaging`: forgectl brings it to the hosts as well.
"""
