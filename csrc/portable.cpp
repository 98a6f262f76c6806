// Linked into both libraries where GCC builds them on Linux: lets them load beside runtimes that are older than the
// compiler, back to those of manylinux_2_28 (glibc 2.28, the libstdc++ of GCC 8), as torch itself does.
//
// Newer headers refer to these few things, which the older runtimes do not have. Defined here, they are not asked of
// the machine that runs.

#include <new>
#include <sstream>

#ifdef __GLIBCXX__

// glibc 2.32. Zero is the answer that is always right: count references atomically.
extern "C" {
extern char __libc_single_threaded;
char __libc_single_threaded = 0;
}

namespace std {

// GCC 9: their constructors without arguments.
template class basic_ostringstream<char>;
template class basic_stringstream<char>;

// GCC 11.
[[noreturn]] void __throw_bad_array_new_length();
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

}  // namespace std

#endif
