"""The CAR dialect: the methods of the CAR daemon, in the forms that its own client sends and takes.

Contract, section 10. On top of the same runs, tools and subscriptions as all else: no second log, no second registry.
"""
