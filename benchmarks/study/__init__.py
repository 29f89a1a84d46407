"""What distillation, its places and its maps are worth: the study of ``docs/study``.

``protocol`` says what is compared, ``plan`` in which order, ``maps`` holds the maps that are not in the library,
``runs`` trains and remembers, ``report`` makes the tables and plots. ``passes`` and ``real`` are studies of their own.
"""
