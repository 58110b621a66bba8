"""`python -m benchmarks.gpu`: are the kernels right, how near do they come to the speed of memory, what do models gain.

The time on a GPU is short. So the parts are measured in the order of what they decide (`plan`), each for about as long
as it says; each writes its rows when it ends (`results`); and they run in a process that may die (`supervise`): what
was measured stays, and the next run goes on from there.
"""
