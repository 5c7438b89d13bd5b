//! `gyrostat report`: what drifted, why, and what was done, as one HTML page.

use std::io::Write;

use minijinja::{AutoEscape, Environment, context};

use crate::config::Config;
use crate::store::Store;

use super::{Error, jsonl};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// File to write to; `-` is stdout.
    #[arg(long)]
    out: String,
}

/// Alarms and updates that are shown at most.
const SHOWN: usize = 1000;

pub(super) fn run(args: &Args, config: &Config) -> Result<(), Error> {
    let store = Store::open(&config.store)?;
    let mut environment = Environment::new();
    environment.set_auto_escape_callback(|_| AutoEscape::Html);
    environment.add_filter("time", |ms: u64| -> String {
        let seconds = ms / 1000;
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        let (year, month, day) = civil(days as i64);
        format!("{year:04}-{month:02}-{day:02} {:02}:{:02}:{:02} UTC", rest / 3600, rest / 60 % 60, rest % 60)
    });
    environment.add_template("report", include_str!("report.html"))?;
    let page = environment.get_template("report")?.render(context! {
        counts => store.counts(),
        alarms => store.alarms(SHOWN)?,
        updates => store.updates(SHOWN)?,
    })?;
    let mut out = jsonl::writer(&args.out)?;
    out.write_all(page.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Year, month and day of a day counted from 1970-01-01 in the Gregorian calendar.
fn civil(days: i64) -> (i64, i64, i64) {
    // Counted from 0000-03-01 in eras of 400 years, so that the leap day comes last in its year.
    let days = days + 719_468;
    let era = days.div_euclid(146_097);
    let of_era = days.rem_euclid(146_097);
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    (era * 400 + year + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::civil;

    #[test]
    fn days_are_dates() {
        assert_eq!(civil(0), (1970, 1, 1));
        assert_eq!(civil(11_016), (2000, 2, 29));
        assert_eq!(civil(20_780), (2026, 11, 23));
    }
}
