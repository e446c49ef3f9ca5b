//! This moment.

/// This moment as upstream notes it: local time, to the microsecond.
pub fn timestamp() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seconds = now.as_secs() as _;
    // SAFETY: all zeros is a value of this plain structure.
    let mut local: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers are to locals, of the types that the function takes.
    #[cfg(unix)]
    unsafe {
        libc::localtime_r(&seconds, &mut local)
    };
    // SAFETY: likewise.
    #[cfg(windows)]
    unsafe {
        libc::localtime_s(&mut local, &seconds)
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:06}",
        local.tm_year + 1900,
        local.tm_mon + 1,
        local.tm_mday,
        local.tm_hour,
        local.tm_min,
        local.tm_sec,
        now.subsec_micros()
    )
}
