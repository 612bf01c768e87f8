// Tells clang which types own memory and which borrow it, before anything defines them. torch says neither, so that no
// compiler warns of an array reference that outlives the braced list or the vector behind it.
#pragma once

namespace std {
template <class T>
class [[gsl::Owner]] initializer_list;
}  // namespace std

namespace c10 {
template <class T>
class [[gsl::Pointer]] HeaderOnlyArrayRef;
}  // namespace c10
