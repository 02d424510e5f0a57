"""The endpoints, a file each: what a body may hold, and how it is answered."""
