//! An arm: a process that answers one line to each line it is given. Kernels can hang a GPU, so every wait has an end.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::vendoring::error::{Error, Result, refuse};

/// How long an arm may take to become ready, and to answer.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// How long it may take to end once nothing more is asked.
const FAREWELL: Duration = Duration::from_secs(10);

pub struct Arm {
    name: String,
    child: Child,
    requests: Option<ChildStdin>,
    answers: Receiver<String>,
    patience: Duration,
    started: Instant,
    /// Whether it said nothing for so long that it was killed.
    hangs: bool,
}

impl Arm {
    /// Starts the program; `name` goes in as its last argument.
    pub fn start(name: &str, mut command: Command, patience: Duration) -> Result<Self> {
        command.arg(name).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|e| {
            Error::Refused(format!("arm {name}: {} cannot be started: {e}", command.get_program().display()))
        })?;
        let requests = child.stdin.take();
        let (sender, answers) = mpsc::channel();
        if let Some(output) = child.stdout.take() {
            thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(std::io::Result::ok) {
                    if sender.send(line).is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Self { name: name.to_owned(), child, requests, answers, patience, started: Instant::now(), hangs: false })
    }

    /// Waits until it has said that it is ready, from its start on as long as its patience is; what libraries print before that goes
    /// to the terminal.
    pub fn ready(&mut self) -> Result<()> {
        loop {
            let line = self.line(self.patience.saturating_sub(self.started.elapsed()), "at its start")?;
            match line.strip_prefix("error ") {
                _ if line == "ready" => return Ok(()),
                Some(text) => refuse!("arm {} cannot start: {text}", self.name),
                None => eprintln!("{}: {line}", self.name),
            }
        }
    }

    /// A number, or none where the arm does not have that case.
    pub fn ask(&mut self, request: &str) -> Result<Option<f64>> {
        let sent = self.requests.as_mut().map(|requests| writeln!(requests, "{request}"));
        if !matches!(sent, Some(Ok(()))) {
            return Err(self.ended(&format!("asked `{request}`")));
        }
        let line = self.line(self.patience, &format!("asked `{request}`"))?;
        if line == "-" {
            return Ok(None);
        }
        if let Some(text) = line.strip_prefix("error ") {
            refuse!("arm {}, asked `{request}`: {text}", self.name);
        }
        match line.trim().parse::<f64>() {
            Ok(value) if value.is_finite() => Ok(Some(value)),
            _ => refuse!(
                "arm {}, asked `{request}`, answered `{line}`; expected a number, `-` or `error TEXT`",
                self.name
            ),
        }
    }

    fn line(&mut self, patience: Duration, doing: &str) -> Result<String> {
        match self.answers.recv_timeout(patience) {
            Ok(line) => Ok(line),
            Err(RecvTimeoutError::Disconnected) => Err(self.ended(doing)),
            Err(RecvTimeoutError::Timeout) => {
                // It may hang in the driver, where killing takes effect late: nothing waits for it.
                let _ = self.child.kill();
                self.hangs = true;
                refuse!(
                    "arm {}, {doing}, said nothing for {} s and was killed; see with nvidia-smi whether the GPU \
                     hangs",
                    self.name,
                    self.patience.as_secs()
                )
            }
        }
    }

    fn ended(&mut self, doing: &str) -> Error {
        // The output is closed: the end itself is near.
        let status = self.wait(Duration::from_secs(1)).map_or("its output is closed".to_owned(), |s| s.to_string());
        Error::Refused(format!(
            "arm {}, {doing}, ended without an answer ({status}); what it said of that is above",
            self.name
        ))
    }

    fn wait(&mut self, patience: Duration) -> Option<std::process::ExitStatus> {
        let started = Instant::now();
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                Ok(None) if started.elapsed() < patience => thread::sleep(Duration::from_millis(10)),
                _ => return None,
            }
        }
    }

    /// Whether it was killed, since it said nothing.
    pub fn hangs(&self) -> bool {
        self.hangs
    }

    /// Whether it is gone, or is about to be.
    pub fn has_ended(&mut self) -> bool {
        self.hangs || self.wait(Duration::from_secs(1)).is_some()
    }

    /// Says that nothing more is asked.
    pub fn dismiss(&mut self) {
        self.requests = None;
    }

    /// Ends it the agreed way.
    pub fn finish(mut self) {
        self.dismiss();
        self.wait(FAREWELL);
    }
}

impl Drop for Arm {
    fn drop(&mut self) {
        // Fails where it has ended already.
        let _ = self.child.kill();
        self.wait(Duration::from_secs(1));
    }
}

/// Runs a program to its end; on failure the error is the last line that it wrote.
pub fn probe(command: &mut Command, patience: Duration) -> std::result::Result<(), String> {
    let shown = command.get_program().display().to_string();
    let (mut reader, writer) = std::io::pipe().map_err(|e| format!("no pipe can be made: {e}"))?;
    let errors = writer.try_clone().map_err(|e| format!("no pipe can be made: {e}"))?;
    let started = command.stdin(Stdio::null()).stdout(writer).stderr(errors).spawn();
    // The command holds the pipe's other end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = started.map_err(|e| format!("{shown} cannot be started: {e}"))?;
    let (sender, output) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = reader.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    let Ok(text) = output.recv_timeout(patience) else {
        let _ = child.kill();
        return Err(format!("its probe did not end within {} s", patience.as_secs()));
    };
    match child.wait() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => {
            let last = text.lines().map(str::trim).rfind(|line| !line.is_empty());
            Err(last.map_or_else(|| format!("its probe ended with {status}"), str::to_owned))
        }
        Err(error) => Err(format!("{shown} cannot be waited for: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, patience: u64) -> Arm {
        let mut command = Command::new("sh");
        command.args(["-c", script, "arm"]);
        Arm::start("tested", command, Duration::from_millis(patience)).unwrap()
    }

    fn refused<T>(result: Result<T>) -> String {
        result.err().map(|error| error.to_string()).unwrap_or_default()
    }

    #[test]
    fn answers_are_numbers_or_a_dash() {
        let mut arm = shell("echo chatter; echo ready; read a; echo 12.5; read a; echo -", 10_000);
        arm.ready().unwrap();
        assert_eq!(arm.ask("host empty"), Ok(Some(12.5)));
        assert_eq!(arm.ask("host gdn 64"), Ok(None));
        arm.finish();
    }

    #[test]
    fn the_name_is_the_last_argument_and_requests_arrive_as_lines() {
        let mut arm = shell("echo ready; read a; echo \"error $1 was asked $a\"", 10_000);
        arm.ready().unwrap();
        assert_eq!(refused(arm.ask("gpu copy 8")), "arm tested, asked `gpu copy 8`: tested was asked gpu copy 8");
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for answer in ["soon", "nan", "inf", "1 2", ""] {
            let mut arm = shell(&format!("echo ready; read a; echo '{answer}'"), 10_000);
            arm.ready().unwrap();
            assert!(refused(arm.ask("host empty")).contains("expected a number"), "{answer}");
        }
    }

    #[test]
    fn an_arm_that_hangs_is_killed_and_named() {
        let mut arm = shell("echo ready; read a; exec sleep 600", 300);
        arm.ready().unwrap();
        let error = refused(arm.ask("gpu gdn 64 1"));
        assert!(error.contains("tested") && error.contains("gpu gdn 64 1") && error.contains("killed"), "{error}");
        assert!(arm.hangs() && arm.has_ended());
        assert!(arm.wait(Duration::from_secs(10)).is_some());
    }

    #[test]
    fn an_arm_that_goes_on_after_an_error_has_not_ended_and_one_that_does_not_has() {
        let mut arm = shell("echo ready; read a; echo error no; read a; echo 5", 10_000);
        arm.ready().unwrap();
        assert_eq!(refused(arm.ask("host topk")), "arm tested, asked `host topk`: no");
        assert!(!arm.has_ended());
        assert_eq!(arm.ask("host rope"), Ok(Some(5.0)));
        let mut arm = shell("echo ready; read a; echo error no", 10_000);
        arm.ready().unwrap();
        assert_eq!(refused(arm.ask("host topk")), "arm tested, asked `host topk`: no");
        assert!(arm.has_ended() && !arm.hangs());
    }

    #[test]
    fn an_arm_that_never_becomes_ready_is_killed_and_named() {
        let mut arm = shell("exec sleep 600", 300);
        let error = refused(arm.ready());
        assert!(error.contains("tested") && error.contains("its start"), "{error}");
    }

    #[test]
    fn an_arm_that_ends_is_an_error() {
        assert!(refused(shell("exit 3", 10_000).ready()).contains("exit status: 3"));
        let mut arm = shell("echo ready; read a; exit 4", 10_000);
        arm.ready().unwrap();
        assert!(refused(arm.ask("host empty")).contains("exit status: 4"));
    }

    #[test]
    fn an_arm_says_why_it_cannot_start() {
        let error = refused(shell("echo error there is no GPU", 10_000).ready());
        assert_eq!(error, "arm tested cannot start: there is no GPU");
    }

    #[test]
    fn a_probe_answers_its_last_line() {
        let run = |script: &str| probe(Command::new("sh").args(["-c", script]), Duration::from_secs(10));
        assert_eq!(run("echo fine"), Ok(()));
        assert_eq!(run("echo one; echo no torch >&2; exit 1"), Err("no torch".to_owned()));
        assert_eq!(run("exit 7"), Err("its probe ended with exit status: 7".to_owned()));
        let hung = probe(Command::new("sleep").arg("600"), Duration::from_millis(100));
        assert_eq!(hung, Err("its probe did not end within 0 s".to_owned()));
    }
}
