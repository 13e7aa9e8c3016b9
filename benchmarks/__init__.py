"""The seven benchmarks: readers, grader, official scores, the runner."""
