"""Trained comparisons that can be repeated: a plan of runs, their execution, what they say.

``plan`` reads what is to be run, ``execute`` starts the processes, ``run`` is what each of them
does, ``compare`` and ``report`` say what came out.
"""
