//! Numbers as the gateways show and take them: a value that looks like a number in its one shortest form is kept
//! as one, so that it can be added to; it reads back the very same.

use bytes::Bytes;
use vasto_client::Data;

/// The longest text that may be a number.
const LONGEST: usize = 24;

/// What to keep for these bytes.
pub(crate) fn data(bytes: Bytes) -> Data {
    match canonical(&bytes) {
        Some(number) => Data::Number(number),
        None => Data::Bytes(bytes),
    }
}

/// What is kept, as bytes.
pub(crate) fn bytes(data: Data) -> Bytes {
    match data {
        Data::Bytes(bytes) => bytes,
        Data::Number(number) => show(number).into(),
    }
}

/// A number in its shortest form that reads back the same, without an exponent.
pub(crate) fn show(number: f64) -> String {
    // There is but one zero.
    (number + 0.0).to_string()
}

fn canonical(bytes: &[u8]) -> Option<f64> {
    let first = *bytes.first()?;
    if bytes.len() > LONGEST || !(first.is_ascii_digit() || first == b'-') {
        return None;
    }
    let text = std::str::from_utf8(bytes).ok()?;
    let number: f64 = text.parse().ok()?;
    (number.is_finite() && show(number) == text).then_some(number)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_the_one_form_is_a_number() {
        for text in ["0", "10", "-7", "3.5", "9007199254740992", "0.1", "-0.001"] {
            assert_eq!(data(text.into()), Data::Number(text.parse().unwrap()), "{text}");
        }
        for text in ["", "-", "+1", "01", "1.0", "1e5", " 1", "-0", "inf", "NaN", "0x10", ".5", "9007199254740993"] {
            assert_eq!(data(text.into()), Data::Bytes(text.into()), "{text}");
        }
    }

    proptest! {
        #[test]
        fn what_was_put_reads_back_the_same(text in "-?[0-9]{0,20}(\\.[0-9]{0,5})?") {
            prop_assert_eq!(bytes(data(text.clone().into())), text);
        }

        #[test]
        fn every_finite_number_has_its_form(number in any::<f64>()) {
            prop_assume!(number.is_finite());
            prop_assert_eq!(show(number).parse::<f64>().unwrap(), number);
        }
    }
}
