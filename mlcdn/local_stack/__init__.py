"""The local stack: Kafka, an S3 store and one Valkey a region, real ones, out of wheels and jars, on this machine.

runtime    what must be on the disk before anything starts: the Java, the jars, the AOT cache
kafka      one part a room: its configuration, its child, how it is known to be ready
s3
valkey
stack      composes the parts into one directory
running    the same from a synchronous program, with faults to inject
errors     the one error that all of them raise
"""
