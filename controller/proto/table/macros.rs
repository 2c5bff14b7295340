//! The grammar of rows, and of names.

/// Rows of the table: an array of [`Row`](super::Row)s.
///
/// ```text
/// rows! {
///     openat(dirfd: DirFd, pathname: Text, flags: OPEN, mode: Mode) -> Fd, may_block, optional(1);
///     pipe2(pipefd => [Fd; 2], flags: PIPE);
///     read(fd: Fd, buf => [Byte; count], count: Size) -> Size, may_block, counted;
/// }
/// ```
///
/// Arguments have the names of the man page, in the order of registers. `:` is what the caller gives, a
/// `Shape`; `=>` is memory that the call fills: a shape, or items with how many there are, a number or the
/// name of the argument that says it. What is behind the result are methods of `Row`.
macro_rules! rows {
    ($(
        $(#[$doc:meta])*
        $call:ident (
            $($arg:ident $(: $given:expr)? $(=> $filled:tt)?),* $(,)?
        ) $(-> $result:expr)? $(, $column:ident $(( $($value:expr),* ))?)* ;
    )*) => {
        [$(
            $crate::proto::table::Row::new(
                $crate::proto::table::Sysno::$call,
                &[$($crate::proto::table::Argument {
                    name: stringify!($arg),
                    shape: $crate::proto::table::rows!(@shape $($given)? $(=> $filled)?),
                }),*],
                $crate::proto::table::rows!(@result $($result)?),
            )$(.$column($($($value),*)?))*
        ),*]
    };
    (@result) => { $crate::proto::table::Shape::Zero };
    (@result $shape:expr) => { $shape };
    (@shape => [$item:ident; $count:literal]) => {
        $crate::proto::table::rows!(@memory $item, $crate::proto::table::Count::Fixed($count))
    };
    (@shape => [$item:ident; $count:ident]) => {
        $crate::proto::table::rows!(
            @memory $item, $crate::proto::table::Count::Argument(stringify!($count))
        )
    };
    (@shape => $shape:expr) => { $shape };
    (@shape $shape:expr) => { $shape };
    (@memory $item:ident, $count:expr) => {
        $crate::proto::table::Shape::Filled(&$crate::proto::table::Memory {
            item: $crate::proto::table::rows!(@item $item),
            count: $count,
        })
    };
    (@item Byte) => { $crate::proto::table::Item::Byte };
    (@item Char) => { $crate::proto::table::Item::Text };
    (@item Fd) => { $crate::proto::table::Item::Word($crate::proto::table::Shape::Fd) };
    (@item Int) => { $crate::proto::table::Item::Word($crate::proto::table::Shape::Int) };
    (@item Id) => { $crate::proto::table::Item::Word($crate::proto::table::Shape::Id) };
    (@item Long) => { $crate::proto::table::Item::Long($crate::proto::table::Shape::Long) };
    (@item Address) => { $crate::proto::table::Item::Long($crate::proto::table::Shape::Address) };
    (@item $layout:ident) => { $crate::proto::table::Item::Struct(&$layout) };
}

/// Shapes with names: `one` of some numbers, or `flags`, with the field that is a number in them. A name that
/// libc lacks has its number behind it.
macro_rules! names {
    ($($(#[$doc:meta])* $shape:ident = $kind:ident $(($field:expr))? {
        $($name:ident $(= $number:literal)?)*
    })*) => {$(
        $(#[$doc])*
        pub(super) const $shape: $crate::proto::table::Shape =
            $crate::proto::table::names!(@kind $kind)(&$crate::proto::table::Names {
                names: &[$((
                    stringify!($name),
                    $crate::proto::table::names!(@number $name $(= $number)?),
                )),*],
                field: 0 $(+ $field as u64)?,
            });
    )*};
    (@kind one) => { $crate::proto::table::Shape::One };
    (@kind flags) => { $crate::proto::table::Shape::Flags };
    (@number $name:ident) => { ::nix::libc::$name as u32 as u64 };
    (@number $name:ident = $number:literal) => { $number };
}

/// A shape of commands: `NAME(arguments) -> result, quick;` each, where what is left out is as the row says.
macro_rules! commands {
    ($(#[$doc:meta])* $shape:ident $(| $flags:ident)* {
        $($name:ident $(= $number:literal)? $(($($arg:expr),*))? $(-> $result:expr)? $(, $quick:ident)?;)*
    }) => {
        $(#[$doc])*
        pub(super) const $shape: $crate::proto::table::Shape =
            $crate::proto::table::Shape::Command(&$crate::proto::table::Commands {
                commands: &[$($crate::proto::table::Command {
                    name: stringify!($name),
                    number: $crate::proto::table::names!(@number $name $(= $number)?),
                    args: $crate::proto::table::commands!(@option $(&[$($arg),*])?),
                    result: $crate::proto::table::commands!(@option $($result)?),
                    quick: $crate::proto::table::commands!(@quick $($quick)?),
                }),*],
                flags: $crate::proto::table::Names {
                    names: &[$((
                        stringify!($flags),
                        $crate::proto::table::names!(@number $flags),
                    )),*],
                    field: 0,
                },
            });
    };
    (@option) => { None };
    (@option $value:expr) => { Some($value) };
    (@quick) => { false };
    (@quick quick) => { true };
}

/// The layout of a structure of libc's: `NAME = libc's name { member: shape, ... }`.
macro_rules! layouts {
    ($($(#[$doc:meta])* $layout:ident = $type:ident { $($member:ident: $shape:expr),* $(,)? })*) => {$(
        $(#[$doc])*
        pub(super) const $layout: $crate::proto::table::Layout = $crate::proto::table::Layout {
            name: stringify!($type),
            size: size_of::<::nix::libc::$type>(),
            members: &[$($crate::proto::table::Member {
                name: stringify!($member),
                offset: ::core::mem::offset_of!(::nix::libc::$type, $member),
                size: $crate::proto::table::size_of_member(
                    |whole: &::nix::libc::$type| &raw const whole.$member
                ),
                shape: $shape,
            }),*],
        };
    )*};
}

pub(crate) use {commands, layouts, names, rows};
