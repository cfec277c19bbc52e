"""Maps of a backbone that are made one at a time: who takes them must not keep them."""

import weakref


def one_at_a_time(maps, alive):
    """Yields copies of the maps, and looks before each whether those before it are gone.

    alive: a list, which gets a weak reference to each."""
    for x in maps:
        assert not any(reference() is not None for reference in alive)
        x = x.clone()
        alive.append(weakref.ref(x))
        yield x
        del x
