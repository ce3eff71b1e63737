"""The page of all hosts: what each answered, judged, drawn and written as one HTML file that needs nothing else."""
