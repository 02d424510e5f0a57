"""The compiler: front ends, passes, pipeline, and the build of artifacts."""
