//! The report as one HTML page that needs nothing else: a timeline for each round, with what was done, what the agents noted, and
//! what the clients saw second by second.

use std::fmt::Write as _;

use super::report::{Moment, Report, Round};

/// Pixels a second, at most.
const SECOND: f64 = 24.0;
/// Width of a timeline, at most.
const WIDTH: f64 = 960.0;
/// Height of the clients' part of a timeline.
const HEIGHT: f64 = 60.0;
/// Height of a row of marks.
const ROW: f64 = 14.0;

const STYLE: &str = "
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em auto; max-width: 1040px; color: #222; background: #fff }
h1 { font-size: 1.4em } table { border-collapse: collapse } td, th { padding: 2px 10px; text-align: right }
td:first-child, th:first-child { text-align: left } tr:nth-child(even) { background: #f4f4f4 }
details { margin: .4em 0; border-top: 1px solid #ddd; padding-top: .4em } summary { cursor: pointer }
.bad { color: #b00020; font-weight: bold } .good { color: #1b6e2d; font-weight: bold }
svg { display: block; margin: .4em 0 } svg text { font: 11px system-ui, sans-serif }
.answers { fill: #9ab8d8 } .wait { stroke: #b45f06; fill: none; stroke-width: 1.5 } .deed { fill: #b00020 }
.state { fill: #1b6e2d } .axis { stroke: #999 } ol { font-size: 12px; columns: 2 } li { break-inside: avoid }
";

/// The page.
#[must_use]
pub fn html(report: &Report) -> String {
    let mut page =
        String::from("<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Understudy: chaos</title>");
    let _ = write!(page, "<style>{STYLE}</style><h1>Chaos: {} rounds, seed {}</h1>", report.rounds.len(), report.seed);
    match &report.failure {
        None => page.push_str("<p class=\"good\">Nothing was broken.</p>"),
        Some(failure) => {
            let _ = write!(page, "<p class=\"bad\">Broken: {}</p>", escape(failure));
            if let Some(kept) = &report.kept {
                let _ = write!(page, "<p>Logs, captures and event logs are in <code>{}</code>.</p>", escape(kept));
            }
        }
    }
    for left_out in &report.left_out {
        let _ = write!(page, "<p>Not played: {}</p>", escape(left_out));
    }
    page.push_str(
        "<p>In each timeline: <span style=\"color:#9ab8d8\">&#9632;</span> answers a second, \
         <span style=\"color:#b45f06\">&#9472;</span> the longest wait for one of them (logarithmic, 1 ms to 100 s), \
         <span style=\"color:#b00020\">&#9660;</span> what was done, <span style=\"color:#1b6e2d\">&#9650;</span> what the agents noted. \
         Hover for words; open a round for all of them.</p>",
    );
    page.push_str(&table(report));
    for round in &report.rounds {
        let _ = write!(page, "<details{}><summary>", if is_last_of_failed(report, round) { " open" } else { "" });
        let _ = write!(page, "{}</summary>{}{}</details>", escape(&round.line()), timeline(round), list(round));
    }
    page.push_str("</html>\n");
    page
}

fn is_last_of_failed(report: &Report, round: &Round) -> bool {
    report.failure.is_some() && report.rounds.last().is_some_and(|last| last.number == round.number)
}

/// What each kind of fault did at worst.
fn table(report: &Report) -> String {
    let mut text = String::from(
        "<table><tr><th>fault<th>rounds<th>copies activated<th>longest wait, ms<th>protected again after, ms</tr>",
    );
    for sum in report.sums() {
        let _ = write!(
            text,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}</tr>",
            escape(&sum.fault),
            sum.rounds,
            sum.activated,
            sum.longest_wait_ms,
            sum.restored_ms
        );
    }
    text + "</table>"
}

fn list(round: &Round) -> String {
    let mut all: Vec<(&Moment, &str)> = round.deeds.iter().map(|deed| (deed, "done: ")).collect();
    all.extend(round.events.iter().map(|event| (event, "")));
    all.sort_by_key(|(moment, _)| moment.at_ms);
    let items = all.iter().map(|(moment, by)| format!("<li>{} ms: {by}{}</li>", moment.at_ms, escape(&moment.what)));
    format!("<ol>{}</ol>", items.collect::<String>())
}

fn timeline(round: &Round) -> String {
    let last = round.deeds.iter().chain(&round.events).map(|moment| moment.at_ms).max().unwrap_or(0);
    let seconds = (last / 1000 + 1).max(i64::try_from(round.seconds.len()).unwrap_or(i64::MAX)).max(1) as f64;
    let scale = (WIDTH / seconds).min(SECOND);
    let (width, height) = (seconds * scale, HEIGHT + 3.0 * ROW);
    let x = |at_ms: i64| (at_ms.max(0) as f64) / 1000.0 * scale;
    let mut svg = format!("<svg width=\"{:.0}\" height=\"{height:.0}\">", width + 60.0);
    let most = round.seconds.iter().map(|second| second.answers).max().unwrap_or(0).max(1);
    let mut line = String::new();
    for (at, second) in (0_u32..).zip(&round.seconds) {
        let left = f64::from(at) * scale;
        let tall = second.answers as f64 / most as f64 * HEIGHT;
        let _ = write!(
            svg,
            "<rect class=\"answers\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{tall:.1}\"><title>second {at}: {} answers, longest wait {} ms</title></rect>",
            ROW + HEIGHT - tall,
            (scale - 1.0).max(0.5),
            second.answers,
            second.longest_us / 1000
        );
        // 1 ms at the bottom, 100 s at the top.
        let share = ((second.longest_us as f64 / 1000.0).max(1.0).log10() / 5.0).min(1.0);
        let _ = write!(line, "{:.1},{:.1} ", left + scale / 2.0, ROW + HEIGHT * (1.0 - share));
    }
    let _ = write!(svg, "<polyline class=\"wait\" points=\"{line}\"/>");
    let base = ROW + HEIGHT;
    let _ = write!(svg, "<line class=\"axis\" x1=\"0\" y1=\"{base}\" x2=\"{width:.1}\" y2=\"{base}\"/>");
    let marks = [(&round.deeds, "deed", "&#9660;", ROW - 3.0), (&round.events, "state", "&#9650;", base + ROW - 3.0)];
    for (moments, class, sign, y) in marks {
        for moment in moments {
            let what = escape(&moment.what);
            let _ = write!(
                svg,
                "<text class=\"{class}\" x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{sign}<title>{} ms: {what}</title></text>",
                x(moment.at_ms),
                moment.at_ms
            );
        }
    }
    let _ = write!(svg, "<text x=\"0\" y=\"{:.1}\">0 s</text>", base + 2.0 * ROW);
    let _ = write!(svg, "<text x=\"{:.1}\" y=\"{:.1}\">{seconds:.0} s</text>", width, base + 2.0 * ROW);
    svg + "</svg>"
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::report::Second;

    #[test]
    fn a_page_has_every_round_and_moment_and_nothing_from_elsewhere() {
        let moment = |at_ms, what: &str| Moment { at_ms, what: what.to_owned() };
        let round = Round {
            number: 1,
            fault: "kill-agent-primary".to_owned(),
            deeds: vec![moment(1500, "SIGKILL to <the agent>")],
            events: vec![moment(1700, "host-b failing-over"), moment(2300, "host-b & alone")],
            seconds: vec![Second { answers: 10, longest_us: 9_000 }, Second { answers: 2, longest_us: 600_000 }],
            ..Round::default()
        };
        let report = Report {
            seed: 5,
            rounds: vec![round],
            failure: Some("round 1: <lost>".to_owned()),
            kept: None,
            planned: 1,
            left_out: Vec::new(),
            on_disk: None,
            seconds: 9.0,
        };
        let page = html(&report);
        for words in [
            "seed 5",
            "kill-agent-primary",
            "SIGKILL to &lt;the agent&gt;",
            "host-b &amp; alone",
            "round 1: &lt;lost&gt;",
        ] {
            assert!(page.contains(words), "{words} is not in {page}");
        }
        assert_eq!(page.matches("class=\"deed\"").count(), 1);
        assert_eq!(page.matches("class=\"state\"").count(), 2);
        assert_eq!(page.matches("<rect").count(), 2);
        assert!(!page.contains("http") && !page.contains("<script"), "it stands alone");
    }
}
