"""What the machine code of the kernels says about their speed, and a prediction from it; docs/performance.md explains.

    sass.py      instructions with their control codes, and the loops they form
    trips.py     how often the loops of a kernel run, by running its source on numbers alone
    capture.py   the launches that the ops make at the design's shapes, taken down on their way to the device
    model.py     registers, issue slots, waits and bytes of a launch, and the time they amount to
    choose.py    the configs that the model likes best
    library.py   loops of the compiled CUDA library
    table.py     the report: JSON, a table to read, and two reports side by side

None of it is a measurement. The figures of the report are predictions, and are kept in docs/predictions/.
"""
