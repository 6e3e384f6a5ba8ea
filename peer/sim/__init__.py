"""The swarm without I/O: the production round machines and codec on a virtual clock, under faults, under watch.

`swarm` puts a simulated run together from one seed; `volunteer` and `aggregator` drive the machines as the programs do;
`network` carries bytes; `hostile` breaks the rules; `checkers` say whenever something that must hold does not.
"""
