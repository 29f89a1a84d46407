"""The study of ``docs/study``: how much students gain by distillation, by its levels and by its information maps.

``protocol`` defines what is compared, ``plan`` the order of the runs, ``maps`` the maps that are not in the library.
``runs`` trains and stores results, ``report`` makes the tables and plots. ``passes`` and ``real`` are further studies.
"""
