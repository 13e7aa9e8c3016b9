"""What a person looks at afterwards: report page, comparison of runs, probe, the grid."""
