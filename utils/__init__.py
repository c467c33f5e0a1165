"""What the notebooks share.

the method     sparsity, pruning, compensation
its steps      choosing, stages: what notebooks, tests and sweeps call
training       step, training, engine
images         data, sources, pictures, prepare
the run        config, runs, resume, checkpoint, archive, foreign, files, results
what is shown  cost, plots, machine
taken along    export
many runs      sweeps, workers, sweep_report
coursework     report, handed_in, blanks, selfcheck
"""
